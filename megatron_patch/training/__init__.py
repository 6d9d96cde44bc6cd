"""From words on a command line to Megatron's own training loop.

words.py        checks, and the words for Megatron's parser that follow from checkpoint and device
loaders.py      our loaders as Megatron's data provider; their state beside each checkpoint
step.py         one micro-batch: broadcast, forward, loss
ledger.py       the account of records over all ranks
logging.py      samples per second and the account, which Megatron does not log
guards.py       bad losses and gradients, iterations to leave out
stopping.py     signals and the time limit: save, end with 0
retention.py    which checkpoints stay; what a save must not leave behind
careful.py      puts these three around Megatron's loop
offload.py      how much of Adam's state goes to host memory
strict_load.py  every weight is there, or one sentence; one line says what was loaded
run.py          puts them together and calls pretrain()
standalone.py   the model of a checkpoint outside the loop
"""
