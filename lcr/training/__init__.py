"""One trainer for every task and model.

    row = train(config, workdir)           # lcr.training.trainer; the configuration: lcr.training.config
    run = load_run(workdir)                # lcr.training.run: model, task, config, step
"""
