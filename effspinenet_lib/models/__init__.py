"""Networks, heads, losses and costs; `zoo` makes every model by name."""
