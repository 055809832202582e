"""Online work: what runs inside the serving image. Never imports `builders`.

Encoders and generators share settings (`settings.ComputeSettings`), rank processes (`ranks`), the GPU (`tensorrt`), the
proof and the server. Where they differ:

                     encoders (`encoding`)                   generators (`generation`)
what runs a graph    `graph.GraphExecutor`: whole batches    `step.StepExecutor`: one step of many rows, with caches
opened by            `encoding.encoder.open_encoder`         `generation.opening.open_engine`
batches              split by length for each execution      continuous: rows join and leave between steps
a dead rank          a keeper starts the group again, and    the engine's thread resets the executor, and streams that
                     requests are refused meanwhile          ran end with an error: their caches are lost
"""
