"""Axmodels, written as a stream."""
