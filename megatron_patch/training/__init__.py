"""From words on a command line to Megatron's own training loop.

words.py        checks, and the words for Megatron's parser that follow from checkpoint and device
loaders.py      our loaders as Megatron's data provider; their state beside each checkpoint
step.py         one micro-batch: broadcast, forward, loss
ledger.py       the account of records, of work and of memory over all ranks
throughput.py   floating-point operations of a step, from its useful tokens
logging.py      what a run says of itself: a line per LOG_INTERVAL, TensorBoard, W&B
stopwatch.py    time of training apart from that of evaluating and saving; time left
progress.py     a bar, where there is a terminal
answers.py      sample answers at each validation
profiling.py    traces of chosen iterations
summary.py      what the run came to
telling.py      puts these around Megatron's loop
guards.py       bad losses and gradients, iterations to leave out
stopping.py     signals and the time limit: save, end with 0
retention.py    which checkpoints stay; what a save must not leave behind
careful.py      puts these three around Megatron's loop
offload.py      how much of Adam's state goes to host memory
strict_load.py  every weight is there, or one sentence; one line says what was loaded
run.py          puts them together and calls pretrain()
standalone.py   the model of a checkpoint outside the loop
"""
