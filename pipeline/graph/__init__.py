"""Pipelines: stages that are jobs of this project, with dependencies and states.

commands    the commands of jobs/pipeline.py
file        the YAML file, or a recipe of recipes.py, as a `Pipeline`
kinds       the jobs that can be stages: config, inputs, outputs, identity
fields      config fields as dotted names and flags
instances   stages -> instances: `matrix`, references, order, checks
references  outputs of other instances in the values of fields
fingerprints  identifies the content at a URI
state       state.json in the output of the pipeline: finished, running and failed versions
recipes     pipelines as Python functions
plan        states of instances with reasons; the selection of instances to run
executor    the interface of executors
processes   executor on this machine: one process per stage
rayjobs     executor on a cluster: one Ray job per stage
runner      runs unfinished instances in parallel
results     results of a job, read from its files
cost        measured cost of stages
estimate    estimated cost of stages
promotion   `promote`: candidate and champion of the pipeline's registered model
record      the MLflow run of the pipeline
report      tables, the plot of the graph, the report page
schema      the JSON schema of a pipeline file
export      lists of commands for other schedulers
"""
