"""Data room: what a record, a conversation and an image are.

preparation/        any source -> energon folder
loading/            energon folder -> micro-batches

What both share, and what imports neither:
record.py           a sample of an energon folder -> record: exchanges, images, system sentence
rejection.py        the reasons for which a record is left out
conversation.py     exchanges -> token ids and labels
templates.py        the conversation formats, as data; the built-in ones are files of conversation_templates/
chat_template.py    the same formats in jinja, for exports
image.py            bytes -> pixels; the check that comes before
video.py            a file or a folder of frames -> frames as encoded images
image_structure.py  damage seen in a JPEG's or PNG's structure, without decoding
"""
