"""Names that a configuration chooses among, where the module that knows them is heavy to import."""

SHARD = ("none", "student", "all")  # see distributed
MEMORY = ("resident", "streamed")  # of the teacher, see residence
OPTIMIZERS = ("adamw", "adamw8bit")  # see optimizer
