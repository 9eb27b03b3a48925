// Layer and head are chosen once for the whole page.
function renderBar() {
  const count = Math.max(1, layer().heads);
  state.head = Math.min(state.head, count - 1);
  get("bar").replaceChildren(
    select("layer", DATA.layers.map((one, i) => [i, one.label]), state.layer, (value) => { state.layer = Number(value); renderAll(); get("bar").querySelector("select").focus(); }),
    select("head", Array.from({ length: count }, (_, i) => [i, i]), state.head, (value) => { state.head = Number(value); renderAll(); get("bar").querySelectorAll("select")[1].focus(); }),
  );
}

function renderAll() {
  renderBar();
  renderText();
  renderMaps();
  renderKernels();
}

buildText(() => {
  renderAll();
  document.body.dataset.ready = "true";
});
