"""What stands in each table: functions that return ``Table``; ``reporting.table`` writes them."""
