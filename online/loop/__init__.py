"""The loop: feedback -> update -> gate -> the same pipeline -> rollout; killed at any moment, it goes on.

records    what is written down    journal   where: one file, replaced whole, and a folder for each update
gathered   feedback -> rows, some of them held out    feedback_files   feedback from files, without a gateway
settings   the spec's words for the parts    opening   the store, and what serves
first      the first version, with a memory of what it can do
drift      has the data moved    due   whether an update begins now, and with which rows
federating an update that clients train, in rounds    joining    a client of such an update
lessons    such rounds as files, for what else drives them
learning   an update is made and judged    building   a candidate through the pipeline, and back
steps      one step of the loop, each of which may be carried out again    run   steps, until a bound
asked      a person's word that a version goes back    served   the version that commands build and serve
timeline   all of it as a page
"""
