"""Writers: the frozen plan, shards, commits, and the pipeline that dumps a teacher."""
