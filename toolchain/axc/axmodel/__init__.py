"""Writing of axmodels."""
