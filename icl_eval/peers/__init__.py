"""Other people's models behind the same two methods (`icl_eval.engine.Answerer`), so that one harness compares them."""
