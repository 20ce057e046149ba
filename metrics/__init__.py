"""What is measured and how it is shown: ranks, intervals, tables, a page."""
