"""The LLaVA of the paper, composed of megatron-core parts.

attention.py    core attention on torch's scaled_dot_product_attention, for the local layers
cpu_attention.py the same on a CPU, for all but long records
key_value_cache.py  keys and values of a batch whose answers are generated
self_attention.py  Megatron's self-attention in few passes on a CPU, for the local layers
linear.py       linear layers of one tensor-parallel rank, without what several need
last_layer.py   the decoder's last layer, behind its attention at labelled positions alone
layer_specs.py  transformer layers of decoder, tower and projector, with and without Transformer Engine
llava.py        the model: tower -> projector -> scatter into the text -> decoder -> loss at labelled positions

Letters of shapes: B micro-batch, S sequence (image placeholders included), H decoder width, V vocabulary,
N images of the micro-batch, P image tokens of one image, T tower width, L labelled positions.
"""
