"""LLaVA-1.5 on Megatron-LM: device, patches, model, data, training and conversion rooms."""
