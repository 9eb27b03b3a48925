// The kernels and head-mixing matrices of the chosen layer, each with its pattern.
function patternFigure(kernel) {
  const figure = kernelFigure(kernel, kernel.title, `${kernel.title}, pattern ${kernel.pattern}`);
  figure.append(node("p", { class: "pattern" }, node("b", {}, kernel.pattern), kernel.share ? `, ${kernel.share}` : ""));
  return figure;
}

// What the names of some kernels' patterns mean.
function explained(kernels) {
  const names = [...new Set(kernels.map((kernel) => kernel.pattern))].filter((name) => DATA.patterns[name]);
  return [node("ul", { class: "notes" }, ...names.map((name) => node("li", {}, node("b", {}, name), `: ${DATA.patterns[name]}`)))];
}

function renderKernels() {
  const all = layer().kernels;
  get("kernels").hidden = !all.length;
  get("kernel-grid").replaceChildren(...kernelGroups(all, patternFigure, explained));
}
