"""Training students on stored signals: losses, configuration, trainer, evaluation.

`losses` work in any training loop; `trainer.DistillTrainer` is a `transformers.Trainer`;
`run.run_training` is what `kdstore train` calls.
"""
