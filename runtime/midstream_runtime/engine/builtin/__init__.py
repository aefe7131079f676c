"""The built-in engine: a small Llama-shaped decoder in plain torch whose KV pages are the slots of the
pool."""
