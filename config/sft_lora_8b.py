"""LoRA on your own data on one GPU of 40 GB, after the configurations of 8B and of LoRA.

    python sft.py config/sft_8b.py config/sft_lora.py config/sft_lora_8b.py \\
        --init_from=SAIL-VL-8B --data=my.jsonl

Marks as in config/sft_lora.py; the script is that of the 8B.
"""
out_dir = "out/sft_lora_8b"
parallel = "ddp"                        # [I] one GPU holds the frozen weights
instruction.weight_decay = 0.05         # [IVL] 8B
