"""The parts of `examples/finetune.py`, in the order in which they are used.

arguments   what can be asked for            output      the output folder: new, resumed or overwritten
own_pages   your data, opened                runs        train, save, read with what was saved
inspection  every page looked at once        scores      error rates and the table
splits      trained on, and held out         page_view   predictions.png
page_size   pixels and tokens of a page      html_report report.html
schedule    steps and learning rates         processes   several processes, of which one writes
"""
