"""What notebooks show: the explorer of one fix, the sweep board, figures, tables, players."""
