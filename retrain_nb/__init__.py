"""A notebook-first, reproducible continuous-retraining workbench: gates that fail closed, runs that are the audit record

Modules:

- `retrain_nb.auditor`: Is this the history that was signed, to the last byte?
- `retrain_nb.demo.flights`: Will this flight be more than 15 minutes late, cancelled or diverted, as far as one could know when it should have left?
- `retrain_nb.demo.flights_view`: What may a model look at before a flight leaves?
- `retrain_nb.demo.toy`: What is the smallest world in which a whole cycle has something to decide?
- `retrain_nb.digest`: Are these two things the same, here and on another machine, today and in five years?
- `retrain_nb.durable`: Once a write has been acknowledged, is it there after a power cut, whole?
- `retrain_nb.faces.cli`: What can a person, or cron, ask of a workbench?
- `retrain_nb.loop.audit`: Is everything that this workbench says still what was written down and signed?
- `retrain_nb.loop.custody`: Who holds the key of the ledger, and who else holds a checkpoint of it?
- `retrain_nb.loop.cycle`: It is 03:00. Is there a reason to retrain, and may the new model take over?
- `retrain_nb.loop.deliver`: Who has to hear of what happened, and has not heard it yet?
- `retrain_nb.loop.history`: What served at that moment, on whose word and what evidence, and where did it come from?
- `retrain_nb.loop.reproduce`: Run again from what was recorded, is it the same model, to the last byte?
- `retrain_nb.loop.retention`: What in the store may go, and why must everything else stay?
- `retrain_nb.loop.runs`: How does a notebook become a record that can be relied upon?
- `retrain_nb.mentions`: Which files, and which other things, does this entry speak of?
- `retrain_nb.merkle`: Is this entry in the record, and is today's record yesterday's with something added?
- `retrain_nb.notes`: Who signed this, and can somebody check it without us?
- `retrain_nb.records`: What do the rooms of this house hand to each other?
- `retrain_nb.services.execute`: Did this page run, all of it, with the parameters we meant?
- `retrain_nb.services.figures`: What does somebody see who has ten seconds?
- `retrain_nb.services.openlineage`: What may a catalog of other people's hear of a run?
- `retrain_nb.services.profile`: What is in the columns, for somebody who wants to look for herself?
- `retrain_nb.services.provenance`: Where does this model come from, and who says so?
- `retrain_nb.services.render`: Can somebody without Jupyter, without a network and without trust read what a run found?
- `retrain_nb.services.session`: What does a run page hold in its hands, and what does it leave behind?
- `retrain_nb.services.tracking`: How does a run get into W&B without W&B ever getting into the run?
- `retrain_nb.services.vetting`: Does this model start, and does it still answer as it did when it was made?
- `retrain_nb.services.workbench`: Where are the stores that the settings name, and what is the recipe of the next model?
- `retrain_nb.settings`: What did the people who own this workbench decide?
- `retrain_nb.stages.contract`: May a model learn from these rows at all?
- `retrain_nb.stages.delays`: How long does a label take, and does that depend on what it says?
- `retrain_nb.stages.evaluate`: How good is the candidate, how much better or worse than its rival, and how sure can we be?
- `retrain_nb.stages.fallbacks`: What stands in for a reading that is late or missing, and how often?
- `retrain_nb.stages.features`: Does the model see in service exactly what it saw in training?
- `retrain_nb.stages.gates`: May this model serve?
- `retrain_nb.stages.maturity`: Have the labels had the time to arrive, and are those that came a fair sample?
- `retrain_nb.stages.signals`: What did we know at that moment, and what did we only learn later?
- `retrain_nb.stages.train`: How do rows become a model, the same one every time?
- `retrain_nb.stores.artifacts`: Is this the model that passed, to the last byte?
- `retrain_nb.stores.catalog`: What serves now, which runs were there, and what was decided about them?
- `retrain_nb.stores.database`: Which database, safely opened, at the right version?
- `retrain_nb.stores.keys`: Which key signs for this workbench, and who could have used it?
- `retrain_nb.stores.ledger`: What happened, in which order, and was it really written down?
- `retrain_nb.stores.origin`: Which code, in which environment, on which machine?
- `retrain_nb.stores.pages`: What does this page ask for, and is it what we are about to tell it?
- `retrain_nb.stores.snapshots`: Are these the very rows that the model was trained on?
- `retrain_nb.stores.turns`: Whose turn is it to work here, and is it still?
- `retrain_nb.windows`: Which rows may a model learn from, and which may judge it?"""

__version__ = "0.1.0"
