"""Learning the resource distribution (section 3.3).

`space` turns betas into dimensions and costs, `controllers` choose betas, `search` trains and
records what they chose, `export` makes a model of the best.
"""
