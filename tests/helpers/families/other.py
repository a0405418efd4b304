"""Models that are refused for other reasons: ALiBi, no positions, encoders and encoder-decoders."""

from .shape import ABSENT, Family

HEADS = {"num_key_value_heads": ABSENT, "intermediate_size": ABSENT}

OTHER = (
    Family("BLOOM", "bloom", "bigscience/bloom-1b7", {**HEADS, "max_position_embeddings": ABSENT}),
    Family("MPT", "mpt", "mosaicml/mpt-7b-instruct",
           {**HEADS, "max_position_embeddings": ABSENT, "max_seq_len": 1024}),
    Family("Falcon RW (ALiBi)", "falcon", "tiiuae/falcon-rw-1b",
           {**HEADS, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True, "num_kv_heads": 4}),
    Family("GPT", "openai-gpt", "openai-community/openai-gpt", HEADS),
    Family("BERT", "bert", "google-bert/bert-base-uncased", {"num_key_value_heads": ABSENT}),
    Family("T5", "t5", "google-t5/t5-small", {}),
    Family("BART", "bart", "facebook/bart-large", {}),
)  # fmt: skip
