"""The pipeline file: stages that are jobs of this project, what each needs and makes, what is done and what is stale.

commands    the commands of jobs/pipeline.py
file        the YAML file, or a recipe of recipes.py, as a `Pipeline`
kinds       the jobs that can be stages: their config, inputs, outputs, and what decides their output
fields      fields of a config by their dotted names, and as flags
instances   stages -> instances: `matrix`, references, order, checks
places      fingerprints of what stands at an address
state       state.json in the pipeline's output: versions that are done, what runs, what failed
recipes     pipelines as Python functions
plan        what is done, stale or waiting, and why; which instances a command runs
executor    what the runner asks of an executor
processes   executor on this machine: a process each
rayjobs     executor on a cluster: a Ray job each
runner      runs what is not done, side by side
results     what a job says of itself, read from its files
cost        what stages took
estimate    what stages will take
promotion   `promote`: candidate and champion of the pipeline's registered model
record      the pipeline's run in MLflow
report      tables, the picture of the graph, the page
schema      the JSON schema of a pipeline file
export      lists of commands for other schedulers
"""
