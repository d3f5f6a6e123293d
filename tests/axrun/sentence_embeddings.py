"""Prints the embeddings of texts that sentence-transformers makes with checkpoints, as JSON.

python -I tests/axrun/sentence_embeddings.py TEXTS CHECKPOINT...
"""

import json
import sys

from sentence_transformers import SentenceTransformer

texts = json.loads(sys.argv[1])
models = [SentenceTransformer(folder, device="cpu", local_files_only=True) for folder in sys.argv[2:]]
print(json.dumps([model.encode(texts).tolist() for model in models]))
