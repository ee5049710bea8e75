"""Learning the resource distribution (section 3.3): space, methods, trials, and what they leave.

`space` turns betas into dimensions and costs; `methods` and `policy` choose betas; `engines`
runs trials in processes of their own or on Ray; `running` tries them again and records them; `run`
connects these to a search, and `references` to distributions that no method chose.
"""
