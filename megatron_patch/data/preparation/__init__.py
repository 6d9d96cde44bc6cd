"""From any source to an energon folder.  Imports nothing of loading.

sources/         what turns one kind of data into records of LLaVA's form
pipeline.py      streams the records of a source, checks them, deals them to splits and shards
workers.py       the processes that read, check and write whole shards
shard_writer.py  tar shards and `.nv-meta`, in the layout that energon reads
workspace.py     the folder a preparation grows in, and the journal by which an interrupted one goes on
report.py        records in = written + rejected, every rejection with its reason
deduplication.py records that were seen before
verification.py  the finished folder, read back by our reader and by energon's
json_stream.py   records of a JSON or JSON-lines file, one at a time
"""
