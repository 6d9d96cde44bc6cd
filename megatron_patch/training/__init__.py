"""From a command line to Megatron's own training loop.

What is wrapped of that loop, in which order and why stands in patches/touch_points.py.

config.py                checks, and the arguments for Megatron's parser that follow from checkpoint and device
preflight.py             the same checks alone, before anything is created
pretrain.py              puts everything together and calls Megatron's pretrain()
callbacks.py             what surrounds Megatron's loop: safeguards and reports
data_provider.py         our loaders as Megatron's data provider
loader_state.py          the loaders' state beside each checkpoint
forward_step.py          one micro-batch: broadcast, forward, loss
strict_load.py           every weight is there, or one sentence; one line says what was loaded
load_model.py            the model of a checkpoint outside the loop
parameter_groups.py      learning rate and weight decay of each module
fresh_optimizer.py       a run that goes on without its optimizer's state
ema.py                   moving average of the trained weights
offload.py               how much of Adam's state goes to host memory
loss_spikes.py           bad losses and gradients, iterations to leave out
graceful_stop.py         signals and the time limit: save, end with 0
checkpoint_retention.py  which checkpoints are retained; what a save must not leave behind
record_counters.py       counts of records, of work and of memory over all ranks
throughput.py            floating-point operations of a step, from its useful tokens
timer.py                 time of training apart from that of evaluating and saving; time left
logging.py               a line per LOG_INTERVAL, TensorBoard, W&B
progress.py              a bar, where there is a terminal
summary.py               what the run came to
sample_generation.py     sample answers at each validation
profiling.py             traces of chosen iterations
"""
