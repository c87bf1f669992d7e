"""HTTP over one engine: the OpenAI and Anthropic protocols, and routes of the cache itself."""
