// Brings the charts of a page to life.
for (const figure of document.querySelectorAll("figure.svdlab-chart")) {
  const [image, data] = figure.children, named = document.createElement("div"), drawn = drawer(named);
  const draw = async (chart) => {
    await drawn(chart);
    image.replaceWith(named);
  };
  figure.tabIndex = 0; // where it is wider than the page, keys scroll it
  unpacked(data.textContent).then((spec) => draw({ spec, alt: image.alt }));
  figure.addEventListener("svdlab-show", ({ detail }) => draw(detail));
}
