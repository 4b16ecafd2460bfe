"""The paper's analyses as commands, `python -m mtt_fast.analysis COMMAND`: each writes numbers (JSON) and pictures."""
