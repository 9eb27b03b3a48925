// The section of learned kernels: those of one mixer, of one layer or all.

// What to show first: the run with the most learned kernels.
const richest = (items) => items.reduce((a, b) => (b.kernels.length > a.kernels.length ? b : a));

// The selector of the mixer whose inspection is shown; `changed` gets the inspection.
const selectMixer = (found, chosen, changed) => select("mixer", found.map((item) => [item.label, `${item.label} (seed ${item.seed})`]), chosen.label,
  (label) => changed(found.find((item) => item.label === label)));

function drawKernels(section) {
  const found = DATA.inspections.filter((item) => item.kernels.length);
  if (!found.length) return;
  section.hidden = false;
  let item = richest(found), layer = "";

  function figure(kernel) {
    const title = `layer ${kernel.layer}, ${kernel.title}`;
    return kernelFigure(kernel, title, `${item.label}, ${title}`);
  }

  function render() {
    const layers = [...new Set(item.kernels.map((kernel) => kernel.layer))];
    if (layer === "" || (layer !== "all" && !layers.includes(Number(layer)))) layer = item.kernels.length > 32 ? String(layers[0]) : "all";
    get("kernel-controls").replaceChildren(
      selectMixer(found, item, (chosen) => { item = chosen; render(); }),
      select("layer", [["all", "all"], ...layers.map((one) => [one, one])], layer, (value) => { layer = value; render(); }),
      legend("negative", "positive; each picture on its own scale", "diverging"),
    );
    get("kernel-grid").replaceChildren(...kernelGroups(item.kernels.filter((kernel) => layer === "all" || kernel.layer === Number(layer)), figure));
  }
  render();
}

drawKernels(get("kernels"));
