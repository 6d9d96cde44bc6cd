"""The launch room: from what a user types to the processes that run.

    __main__.py       what every launcher (bash) becomes: finds its command, checks, starts
    commands.py       the commands by name
    rules.py          what one value must be
    rows.py           arguments and options; a call of them, and all that is wrong with it
    tables.py         --help, refusals and the READMEs' tables, from the rows
    machine.py        nodes, processes and devices of a job
    training.py       rows of both stages, and the words for Megatron that they become
    presets.py        published recipes
    training_rules.py the rules that hold between arguments of a training run
    stored_data.py    data in object storage, looked at before the start
    conversion.py     rows, rules and words of the checkpoint converter
    run_file.py       the values of a run in a file: --config, --from, and beside the checkpoints
    asking.py         chat, server, prompts and benchmarks: their options and rules
    completion.py     what may stand where TAB is pressed
    doctor.py         what of this machine training will use
    job_words.py      a job as its user would start it, looked at from another machine, and so
      plan.py         memory, time and layouts, on paper
      rehearsal.py    any of its ranks, started here
    processes.py      the processes of one node while they run
    heartbeat.py      the nodes hear of each other

Standard library only, and the modules of megatron_patch that need no more: a wrong call is refused before torch would
have been imported.
"""
