"""Write rows to disk in an order that survives crashes."""
