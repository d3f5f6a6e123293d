"""What compiler and runner share: axmodels, bundles, dtypes, reference logits on disk."""
