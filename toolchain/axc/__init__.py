"""The compiler: a Hugging Face checkpoint becomes a bundle of axmodels."""

VERSION = "0.1.0"
