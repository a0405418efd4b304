"""Decoders with latent attention, sparse indexers, or keys shared between layers."""

from .shape import ABSENT, LONGROPE, WINDOW, Family, layers, rope

RANKS = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
         "num_key_value_heads": 4}  # fmt: skip
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 32,
          "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.5}  # fmt: skip
YARN = rope("yarn", factor=40.0, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0,
            original_max_position_embeddings=64)  # fmt: skip
INDEXER = {"index_topk": 32, "index_head_dim": 16, "index_n_heads": 2}

LATENT = (
    Family("DeepSeek V2", "deepseek_v2", "deepseek-ai/DeepSeek-V2-Lite-Chat",
           {**RANKS, **ROUTED, "q_lora_rank": None, "topk_method": "greedy", "first_k_dense_replace": 1,
            "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}}),
    Family("DeepSeek V3, R1", "deepseek_v3", "deepseek-ai/DeepSeek-R1",
           {**RANKS, **ROUTED, "first_k_dense_replace": 1, "norm_topk_prob": True, "rope_parameters": YARN}),
    Family("GLM-4.7-Flash", "glm4_moe_lite", "zai-org/GLM-4.7-Flash",
           {**RANKS, **ROUTED, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}),
    Family("MiniCPM3", "minicpm3", "openbmb/MiniCPM3-4B",
           {**RANKS, "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16, "head_dim": None,
            "tie_word_embeddings": False, "rope_parameters": rope(
                "longrope", short_factor=[1.1] * 4, long_factor=[1.9] * 4, original_max_position_embeddings=512)},
                LONGROPE),
    Family("Youtu-LLM", "youtu", "tencent/Youtu-LLM-2B", {**RANKS, "rope_parameters": rope(theta=1.6e6)}),
    Family("LongCat-Flash", "longcat_flash", "meituan-longcat/LongCat-Flash-Chat",
           {**RANKS, "head_dim": 8, "num_hidden_layers": ABSENT, "num_layers": 2, "intermediate_size": ABSENT,
            "ffn_hidden_size": 96,
            "n_routed_experts": 4, "moe_topk": 2, "zero_expert_num": 2, "expert_ffn_hidden_size": 32,
            "routed_scaling_factor": 1.5}),
    Family("DeepSeek V3.2", "deepseek_v32", "deepseek-ai/DeepSeek-V3.2",
           {**RANKS, **ROUTED, **INDEXER, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}),
    Family("GLM-5", "glm_moe_dsa", "zai-org/GLM-5",
           {**RANKS, **ROUTED, **INDEXER, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}),
    Family("DeepSeek V4", "deepseek_v4", "deepseek-ai/DeepSeek-V4-Flash",
           {"num_key_value_heads": 1, "head_dim": 32, "sliding_window": WINDOW,
            "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"] * 2}),
    Family("Gemma 3n (text)", "gemma3n_text", "google/gemma-3n-E2B-it",
           {"head_dim": 16, "intermediate_size": [96] * 4, "vocab_size_per_layer_input": 512,
            "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2, "laurel_rank": 8, "sliding_window": WINDOW,
            "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
            "layer_types": layers("sliding", "full", "sliding", "full")}),
    Family("Gemma 4 E2B and E4B (text)", "gemma4_text", "google/gemma-4-E2B-it",
           {"head_dim": 16, "global_head_dim": 32, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 512,
            "hidden_size_per_layer_input": 8, "use_double_wide_mlp": True, "final_logit_softcapping": 30.0,
            "num_key_value_heads": 1, "sliding_window": WINDOW,
            "layer_types": layers("sliding", "full", "sliding", "full")}),
    Family("Gemma 4 31B (text)", "gemma4_text", "google/gemma-4-31B-it",
           {"head_dim": 16, "global_head_dim": 32, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
            "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "final_logit_softcapping": 30.0,
            "sliding_window": WINDOW, "layer_types": layers("sliding", "sliding", "sliding", "full")}),
)  # fmt: skip
