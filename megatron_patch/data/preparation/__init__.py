"""From any source to an energon folder.  Imports nothing of loading.

sources/         what turns one kind of data into records of LLaVA's form
pipeline.py      streams the records of a source, checks them, deals them to splits and shards
workers.py       the processes that read, check and write whole shards
ray_workers.py   the same work done by the nodes of a Ray cluster
parts.py         one conversion as N jobs that share only a folder
sight.py         does another machine see the same files?
shard_writer.py  tar shards and `.nv-meta`, in the layout that energon reads
workspace.py     the folder a preparation grows in: of a whole one, of a part, of all parts to be joined
journal.py       what is done of it, by which an interrupted one goes on
report.py        records in = written + rejected, every rejection with its reason
deduplication.py records that were seen before
verification.py  the finished folder, read back by our reader and by energon's
json_stream.py   records of a JSON or JSON-lines file, one at a time
"""
