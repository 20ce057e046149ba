"""What is measured and how it is shown: ranks, protocol, queries, intervals, tables, pages."""
