"""What happens while a batch passes through a pruned model.

Four things are known of a site, each in one place. Where it lies in the model is a ``SiteBinding``: it never changes.
What calibration and earlier batches have taught is its ``SiteState``. The units it computes with now, and the weights
cut to them, are an ``OpenCut``. These three are in :mod:`.site_cut`. What holds for one batch alone is a ``Batch``,
with a ``SiteBatch`` for every site, in :mod:`.batch`: made when the decoder is called, gone when the call ends. Other
threads and copies of the model have batches of their own.

One batch of a strategy that decides per batch:

1.  The decoder is called. ``DecoderForward`` makes the ``Batch``: its shape, its real tokens (:mod:`.hooks`).
2.  A layer begins. The batch notes the layer's key/value cache; in a decode step the decisions that go with the cache
    are used, and steps 4 to 7 are left out (:mod:`.decode_cache`).
3.  The site's norm reads the residual stream, which the batch keeps until the block is entered (:mod:`.hooks`).
4.  Select: the strategy's selector picks the probe's rows and positions (:mod:`.probing`).
5.  Probe: the block's own forward runs on them, all units kept; its consumer returns what it reads. From that come the
    probe's statistic and mean (:mod:`.probing`).
6.  Score: the merger joins the statistic with history, the scorer scores the units, the highest are kept
    (:mod:`.decider`).
7.  The site opens an ``OpenCut`` to these units, and its modules take the sizes of the smaller site (:mod:`.site_cut`).
8.  Each producer (q/k/v, gate/up) asks the mask applier for its weight, and computes with it in one of three ways:
    inside a fused product, with the probe's products taken over, or with a copy (:mod:`.linears`, :mod:`.gathering`).
9.  The block computes its smaller attention or MLP: the model's own code.
10. Observe: the consumer (o_proj, down_proj) shows what it reads, and the updated history waits with the batch
    (:mod:`.learning`).
11. The consumer computes with its cut weight, compensation included (:mod:`.compensation`). When the next site is
    entered this one closes, unless its units serve further passes.
12. Commit: the decoder has returned, everything was finite, and histories are written (:mod:`.learning`). A batch that
    failed on its way has taught nothing.

Where units are decided once, cuts stay open and only steps 8, 9 and 11 are left. Around this: :mod:`.engine` puts all
of it on a model and takes it off; :mod:`.ahead` decides for a site while the one before it runs; :mod:`.checkpointing`
repeats decisions in a backward pass; :mod:`.compiling` compiles the decoder; :mod:`.kv_index` is attention for unevenly
cut query heads; :mod:`.runtime` holds the options of all this, and announces the steps of a decision.
"""
