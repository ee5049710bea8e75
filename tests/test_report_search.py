"""The pages of the search: what they say is what a record holds, and nothing without one."""
