"""Models with a running state: state-space, linear-attention, convolution and recurrent layers."""

from .shape import ABSENT, Family, layers

HEADLESS = {"num_attention_heads": ABSENT, "num_key_value_heads": ABSENT, "max_position_embeddings": ABSENT}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
LINEAR = {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
          "linear_num_value_heads": 4, "layer_types": layers("linear", "linear", "linear", "full"),
          "head_dim": 16}  # fmt: skip
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
          "shared_expert_intermediate_size": 32}  # fmt: skip

RECURRENT = (
    Family("Qwen3-Next", "qwen3_next", "Qwen/Qwen3-Next-80B-A3B-Instruct", {**LINEAR, **ROUTED}),
    Family("Qwen3.5, Qwen3.6 (text)", "qwen3_5_text", "Qwen/Qwen3.5-4B", LINEAR),
    Family("Qwen3.5, Qwen3.6 MoE (text)", "qwen3_5_moe_text", "Qwen/Qwen3.5-35B-A3B",
           {**LINEAR, **ROUTED, "intermediate_size": ABSENT}),
    Family("Falcon-H1", "falcon_h1", "tiiuae/Falcon-H1-1.5B-Instruct", {**MAMBA2, "mamba_d_ssm": 128}),
    Family("Granite 4 hybrid", "granitemoehybrid", "ibm-granite/granite-4.0-h-tiny",
           {**MAMBA2, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 32,
            "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"]}),
    Family("Nemotron-H, Nemotron Nano 2 and 3", "nemotron_h", "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
           {"num_hidden_layers": ABSENT, "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
            "head_dim": 16, "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1}),
    Family("Jamba", "jamba", "ai21labs/AI21-Jamba-Mini-1.7",
           {"attn_layer_period": 4, "attn_layer_offset": 2, "num_experts": 4, "num_experts_per_tok": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4}),
    Family("Bamba", "bamba", "ibm-ai-platform/Bamba-9B-v2", {**MAMBA2, "attn_layer_indices": [3]}),
    Family("Zamba2", "zamba2", "Zyphra/Zamba2-1.2B-instruct",
           {"layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention"],
            "mamba_d_state": 16}),
    Family("LFM2", "lfm2", "LiquidAI/LFM2-1.2B", {"layer_types": layers("conv", "conv", "full", "conv")}),
    Family("LFM2 MoE", "lfm2_moe", "LiquidAI/LFM2-8B-A1B",
           {"layer_types": layers("conv", "conv", "full", "conv"), "num_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 32}),
    Family("Kimi Linear", "kimi_linear", "moonshotai/Kimi-Linear-48B-A3B-Instruct",
           {"max_position_embeddings": ABSENT, "layer_types": layers("linear", "linear", "linear", "full"),
            "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "num_experts": 4,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "num_experts_per_token": 2,
            "num_key_value_heads": 4}),
    Family("MiniMax-Text-01", "minimax", "MiniMaxAI/MiniMax-Text-01-hf",
           {"num_local_experts": 4, "layer_types": layers("linear", "full", "linear", "full")}),
    Family("OLMo hybrid", "olmo_hybrid", "allenai/Olmo-Hybrid-7B",
           {"layer_types": layers("linear", "linear", "linear", "full"), "linear_num_key_heads": 4,
            "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}),
    Family("RecurrentGemma", "recurrent_gemma", "google/recurrentgemma-2b-it",
           {"max_position_embeddings": ABSENT, "attention_window_size": 16, "lru_width": 64, "head_dim": 16,
            "block_types": ["recurrent", "recurrent", "attention"]}),
    Family("Mamba", "mamba", "state-spaces/mamba-1.4b-hf", {**HEADLESS, "intermediate_size": ABSENT}),
    Family("Mamba 2, Codestral Mamba", "mamba2", "mistralai/Mamba-Codestral-7B-v0.1",
           {**HEADLESS, "intermediate_size": ABSENT, "num_heads": 8, "head_dim": 16, "n_groups": 1}),
    Family("Falcon Mamba", "falcon_mamba", "tiiuae/falcon-mamba-7b-instruct",
           {**HEADLESS, "intermediate_size": ABSENT}),
    Family("RWKV", "rwkv", "RWKV/rwkv-4-1b5-pile", {**HEADLESS, "attention_hidden_size": 64}),
    Family("xLSTM", "xlstm", "NX-AI/xLSTM-7b",
           {**HEADLESS, "intermediate_size": ABSENT, "num_blocks": 4, "num_heads": 4, "embedding_dim": 64}),
)  # fmt: skip
