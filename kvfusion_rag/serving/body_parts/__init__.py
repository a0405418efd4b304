"""Parts of request bodies: the base class of all objects, and messages, tools and formats as OpenAI describes them."""
