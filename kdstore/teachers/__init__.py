"""Teachers: what turns samples into signals. The contract is ``kdstore.teacher.Teacher``."""
