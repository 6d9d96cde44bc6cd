"""From words on a command line to Megatron's own training loop.

words.py        checks, and the words for Megatron's parser that follow from checkpoint and device
loaders.py      our loaders as Megatron's data provider; their state beside each checkpoint
step.py         one micro-batch: broadcast, forward, loss
logging.py      samples per second, which Megatron does not log
run.py          puts them together and calls pretrain()
"""
