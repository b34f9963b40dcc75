"""How long the processes of a server wait for one another.

The launcher asks each child once a second with ``Ping``, which the child's loop answers with ``Pong`` between
two pieces of work. There are two budgets, as a child that starts answers nothing: it loads a model or touches
its memory. One that exceeds its budget is killed and started again; before the server is ready, it ends the
server. Before that, clients whose requests wait for one that is silent are told; if it comes back nothing is
lost, for connections between processes of one machine last as long as the processes.
"""

STARTING_S = 1800.0  # from its start to its first message: a terabyte is touched, or weights are read
SERVING_S = 120.0  # to answer a Ping; a GPU that is stuck is given up after half of it
STALLED_S = 5.0  # without an answer, after which clients are told
DRAIN_S = 5.0  # for a store that is ended to write what is not on disk yet
