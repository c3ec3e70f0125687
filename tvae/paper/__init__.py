"""The paper, reproduced: its tables and figures, the runs behind them, and the numbers that it prints."""
