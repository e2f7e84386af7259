"""The paper's whole sweep: what to run, in which order, what it shares and what it costs."""
