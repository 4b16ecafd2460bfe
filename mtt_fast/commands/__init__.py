"""Code that the commands share: options, parsing, exit statuses, the loop of runs, plots, tables and records."""
