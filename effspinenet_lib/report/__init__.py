"""Tables, plots and diagrams of the paper's numbers and of what was measured."""
