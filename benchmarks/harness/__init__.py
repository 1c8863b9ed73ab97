"""What the benchmarks share: arguments, workloads, rounds, context, results.

``arguments``
    The options that every benchmark has, ``--threads``, ``--rounds``, ``--quick``, ``--save``.
``workloads``
    Layers and networks, and how their columns are pruned.
``rounds``
    Contenders timed in turns.
``context``
    What figures depend on: device, versions, date, commit, command.
``results``
    Rows as JSON and Markdown, each with its context.

``rounds`` and ``workloads`` use public names of ``spp_lightning`` alone: ``versus.py`` runs them on
an older checkout of it, too.
"""
